// SPDX-License-Identifier: Apache-2.0
// bfloat16 products on x86 with AVX512-BF16, for the few hundred rows that an expert gets.
//
// A library prepares code and operands for each new shape, and an expert's number of rows is never
// the same twice. Here any shape takes the same code:
//
//   for each block of rows of a:            packed once into the scratch, second level cache
//     for each panel of 32 columns of b:    packed in steps of 512 terms, first level cache;
//     threads
//       for each 12 rows of the block:      24 accumulators of 16 floats in registers
//
// One vdpbf16ps multiplies 32 pairs and adds them to 16 sums, two neighbouring terms of a sum at a
// time. So packing makes, of every two terms of a line (a row of a, a column of b), one 32-bit pair
// and puts the same pair of all lines next to each other. A line whose terms are contiguous is
// transposed in registers, 16 x 16 pairs at once; lines that are contiguous among each other are
// interleaved. Missing lines and an odd last term are zero. The instruction takes subnormal numbers
// for zero.
#include "gemm_bf16.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>

#include "fomoe/parallel.h"

// No lambda and no inline function of a header may use these instructions: a lambda does not take
// the attribute over, and the linker could choose this copy of the function for every processor.
#define FOMOE_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

#ifndef __clang__
// GCC's own intrinsics begin with a register of any content, and it warns of that.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fomoe::cpu {
namespace {

constexpr int kRows = 12;       // of a, in registers
constexpr int kCols = 32;       // of b: two vectors of 16 sums
constexpr int64_t kStep = 512;  // terms of a packed panel of b
constexpr int64_t kPairsPerFetch = 4;
constexpr int64_t kBlockPairs = kGemmScratchBytes / 4;  // of a packed block of a
constexpr int64_t kMaxBlockRows = 384;
constexpr int64_t kShortestBlock = 96;  // rows; with fewer, packing b costs too much

/// Lines of a matrix: the terms that a product sums over run along them.
struct Lines {
  const uint16_t* data;
  int64_t line_stride;
  int64_t term_stride;  // one of the two strides is 1
};

FOMOE_AVX512_BF16 inline __mmask16 mask16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}
FOMOE_AVX512_BF16 inline __mmask32 mask32(int64_t count) {
  return count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

/// Transposes 16 x 16 pairs.
FOMOE_AVX512_BF16 inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // Now v[4 i + j] holds, in its lane q, pair 4 q + j of lines 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    v[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    v[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

/// Up to 16 lines with contiguous terms; pair p of line i goes to packed[p * width + i].
FOMOE_AVX512_BF16 void pack_transposed(const Lines& lines, int64_t count, int64_t terms,
                                       int64_t width, uint32_t* packed) {
  const __mmask16 stored = mask16(std::min<int64_t>(width, 16));
  for (int64_t term = 0; term < terms; term += 32) {
    const __mmask32 loaded = mask32(terms - term);
    __m512i v[16];
    for (int i = 0; i < 16; ++i) {
      v[i] = i < count ? _mm512_maskz_loadu_epi16(loaded, lines.data + i * lines.line_stride + term)
                       : _mm512_setzero_si512();
    }
    transpose(v);
    const int64_t pairs = std::min<int64_t>(16, (terms - term + 1) / 2);
    uint32_t* target = packed + term / 2 * width;
    for (int64_t p = 0; p < pairs; ++p) _mm512_mask_storeu_epi32(target + p * width, stored, v[p]);
  }
}

/// Up to 32 lines that are contiguous among each other; the same result.
FOMOE_AVX512_BF16 void pack_interleaved(const Lines& lines, int64_t count, int64_t terms,
                                        int64_t width, uint32_t* packed) {
  const __mmask32 loaded = mask32(count);
  const __mmask16 first_stored = mask16(std::min<int64_t>(width, 16));
  __m512i first, second;  // where the pairs of lines 0 to 15 and 16 to 31 come from
  {
    alignas(64) uint16_t from[2][32];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 16; ++i) {
        from[half][2 * i] = static_cast<uint16_t>(16 * half + i);
        from[half][2 * i + 1] = static_cast<uint16_t>(32 + 16 * half + i);
      }
    }
    first = _mm512_load_si512(from[0]);
    second = _mm512_load_si512(from[1]);
  }
  for (int64_t term = 0; term < terms; term += 2) {
    const uint16_t* source = lines.data + term * lines.term_stride;
    const __m512i even = _mm512_maskz_loadu_epi16(loaded, source);
    const __m512i odd = term + 1 < terms
                            ? _mm512_maskz_loadu_epi16(loaded, source + lines.term_stride)
                            : _mm512_setzero_si512();
    uint32_t* target = packed + term / 2 * width;
    _mm512_mask_storeu_epi32(target, first_stored, _mm512_permutex2var_epi16(even, first, odd));
    if (width > 16) _mm512_storeu_si512(target + 16, _mm512_permutex2var_epi16(even, second, odd));
  }
}

/// Packs `count` <= width lines from line `first` on, terms [term, term + terms).
void pack(const Lines& lines, int64_t first, int64_t count, int64_t term, int64_t terms,
          int64_t width, uint32_t* packed) {
  const Lines part = {lines.data + first * lines.line_stride + term * lines.term_stride,
                      lines.line_stride, lines.term_stride};
  if (lines.term_stride != 1) return pack_interleaved(part, count, terms, width, packed);
  pack_transposed(part, std::min<int64_t>(count, 16), terms, width, packed);
  if (width > 16) {
    const Lines rest = {part.data + 16 * part.line_stride, part.line_stride, part.term_stride};
    pack_transposed(rest, std::max<int64_t>(count - 16, 0), terms, width, packed + 16);
  }
}

/// Memory to fetch into the second level cache while multiplying, one address per cache line.
struct Fetches {
  const uint16_t* const* next;
  const uint16_t* const* end;
};

/// Where 12 rows by 32 columns of the product go: to the sums between two steps, rounded to c after
/// the last.
struct Tile {
  float* sums;           // [12][32]
  uint16_t* c;           // the first of its elements
  int64_t c_stride;      // between rows
  int64_t cols;          // up to 32
  const uint16_t* bias;  // [cols], or nullptr
  bool is_first, is_last;
};

FOMOE_AVX512_BF16 inline __m512 widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

/// Adds packed a [pairs][12] times packed b [pairs][32] to the tile.
template <int rows>
FOMOE_AVX512_BF16 void accumulate(const uint32_t* a, const uint32_t* b, int64_t pairs,
                                  const Tile& tile, Fetches& fetches) {
  __m512 s[rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    s[i][0] = tile.is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(tile.sums + i * kCols);
    s[i][1] = tile.is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(tile.sums + i * kCols + 16);
  }
  for (int64_t begin = 0; begin < pairs; begin += kPairsPerFetch) {
    if (fetches.next < fetches.end) __builtin_prefetch(*fetches.next++, 0, 2);
    const int64_t end = begin + kPairsPerFetch < pairs ? begin + kPairsPerFetch : pairs;
    for (int64_t p = begin; p < end; ++p) {
      const auto b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + p * kCols));
      const auto b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + p * kCols + 16));
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
        const auto pair =
            reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[p * kRows + i])));
        s[i][0] = _mm512_dpbf16_ps(s[i][0], pair, b0);
        s[i][1] = _mm512_dpbf16_ps(s[i][1], pair, b1);
      }
    }
  }
  if (!tile.is_last) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      _mm512_storeu_ps(tile.sums + i * kCols, s[i][0]);
      _mm512_storeu_ps(tile.sums + i * kCols + 16, s[i][1]);
    }
    return;
  }
  const __mmask32 stored = mask32(tile.cols);
  __m512 bias0 = _mm512_setzero_ps(), bias1 = _mm512_setzero_ps();
  if (tile.bias) {
    const __m512i values = _mm512_maskz_loadu_epi16(stored, tile.bias);
    bias0 = widen(_mm512_castsi512_si256(values));
    bias1 = widen(_mm512_extracti64x4_epi64(values, 1));
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    const __m512bh rounded =
        _mm512_cvtne2ps_pbh(_mm512_add_ps(s[i][1], bias1), _mm512_add_ps(s[i][0], bias0));
    _mm512_mask_storeu_epi16(tile.c + i * tile.c_stride, stored,
                             reinterpret_cast<__m512i>(rounded));
  }
}

using Accumulate12 = void (*)(const uint32_t*, const uint32_t*, int64_t, const Tile&, Fetches&);
constexpr Accumulate12 kAccumulate[kRows + 1] = {
    nullptr,        accumulate<1>,  accumulate<2>, accumulate<3>, accumulate<4>,
    accumulate<5>,  accumulate<6>,  accumulate<7>, accumulate<8>, accumulate<9>,
    accumulate<10>, accumulate<11>, accumulate<12>};

/// Writes down the cache lines that pack() will read for these lines and terms; returns how many.
int64_t cache_lines(const Lines& lines, int64_t first, int64_t count, int64_t term, int64_t terms,
                    const uint16_t** addresses) {
  const uint16_t* data = lines.data + first * lines.line_stride + term * lines.term_stride;
  const bool is_transposed = lines.term_stride == 1;
  const int64_t outer = is_transposed ? count : terms, inner = is_transposed ? terms : 1;
  const int64_t stride = is_transposed ? lines.line_stride : lines.term_stride;
  int64_t found = 0;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; j += 32) addresses[found++] = data + i * stride + j;
  }
  return found;
}

/// Columns [col, col + kCols) of c, as far as there are, for one packed block of rows of a.
void multiply_panel(const uint32_t* block, int64_t rows, int64_t terms, const Lines& b, int64_t col,
                    const uint16_t* bias, uint16_t* c, int64_t num_cols) {
  alignas(64) uint32_t panel[kStep / 2 * kCols];
  alignas(64) float sums[kMaxBlockRows * kCols];
  const uint16_t* addresses[kStep];
  const int64_t pairs = ceil_div(terms, 2);
  const auto cols_from = [&](int64_t begin) { return std::min<int64_t>(kCols, num_cols - begin); };
  for (int64_t term = 0; term < terms; term += kStep) {
    const int64_t step = std::min(kStep, terms - term);
    pack(b, col, cols_from(col), term, step, kCols, panel);
    // b comes from memory, once. What is packed next is fetched while this is multiplied, and
    // evenly over that time: a burst of fetches would make the processor wait for them.
    const bool is_last = term + step == terms;
    const int64_t next_col = is_last ? col + kCols : col, next_term = is_last ? 0 : term + step;
    Fetches fetches = {addresses, addresses};
    if (next_col < num_cols) {
      fetches.end += cache_lines(b, next_col, cols_from(next_col), next_term,
                                 std::min(kStep, terms - next_term), addresses);
    }
    for (int64_t row = 0; row < rows; row += kRows) {
      const Tile tile = {sums + row * kCols,
                         c + row * num_cols + col,
                         num_cols,
                         cols_from(col),
                         bias ? bias + col : bias,
                         term == 0,
                         is_last};
      kAccumulate[std::min<int64_t>(kRows, rows - row)](block + row * pairs + term / 2 * kRows,
                                                        panel, ceil_div(step, 2), tile, fetches);
    }
  }
}

/// Whether dot products are this processor's fastest way: not when it also has AMX tiles.
bool is_fastest_with_dot_products() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
  return !has_amx && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

bool multiply_bf16(const Matrix& a, const Matrix& b, const void* bias, const DenseMatrix& c,
                   void* scratch) {
  static const bool is_fastest = is_fastest_with_dot_products();
  const Lines rows = {static_cast<const uint16_t*>(a.data), a.row_stride, a.col_stride};
  const Lines cols = {static_cast<const uint16_t*>(b.data), b.col_stride, b.row_stride};
  const auto is_dense = [](const Lines& l) { return l.line_stride == 1 || l.term_stride == 1; };
  const int64_t terms = a.cols, pairs = ceil_div(terms, 2);
  const int64_t block_rows = std::min(kMaxBlockRows, kBlockPairs / pairs / kRows * kRows);
  if (!is_fastest || !is_dense(rows) || !is_dense(cols)) return false;
  if (block_rows < std::min(kShortestBlock, c.rows)) return false;

  uint32_t* block = static_cast<uint32_t*>(scratch);
  for (int64_t first = 0; first < c.rows; first += block_rows) {
    const int64_t count = std::min(block_rows, c.rows - first);
    for (int64_t row = 0; row < count; row += kRows) {
      pack(rows, first + row, std::min<int64_t>(kRows, count - row), 0, terms, kRows,
           block + row * pairs);
    }
    uint16_t* out = static_cast<uint16_t*>(c.data) + first * c.cols;
    parallel_for(ceil_div(c.cols, kCols), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        multiply_panel(block, count, terms, cols, panel * kCols, static_cast<const uint16_t*>(bias),
                       out, c.cols);
      }
    });
  }
  return true;
}

}  // namespace fomoe::cpu

#else

namespace fomoe::cpu {
bool multiply_bf16(const Matrix&, const Matrix&, const void*, const DenseMatrix&, void*) {
  return false;
}
}  // namespace fomoe::cpu

#endif
