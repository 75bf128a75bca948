// SPDX-License-Identifier: Apache-2.0
// torch.ops.fomoe_nccl: the NCCL transport. Not among torch.ops.fomoe, for these are no functions
// of their arguments: they open a library, join other processes, and exchange with them.
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "comm/nccl/transport.h"
#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

using comm::Stage;
using comm::nccl::Library;
using comm::nccl::NcclTransport;
using comm::nccl::UniqueId;
using Counts = std::vector<int64_t>;

/// A rank of a world, on a device.
struct Member {
  std::shared_ptr<NcclTransport> transport;
  int32_t device_index;
};

/// What this process has open.
struct State {
  std::mutex mutex;
  std::shared_ptr<const Library> library;
  std::map<int64_t, Member> members;
  int64_t next_communicator = 1;
};

/// Never destroyed: when a process ends, CUDA may be gone before this library.
State& state() {
  static auto* const only = new State;
  return *only;
}

std::shared_ptr<const Library> opened(const std::string& path) {
  State& here = state();
  const std::lock_guard lock(here.mutex);
  if (!here.library) here.library = Library::open(path);
  return here.library;
}

Member member_of(const char* op, int64_t communicator) {
  State& here = state();
  const std::lock_guard lock(here.mutex);
  const auto found = here.members.find(communicator);
  check(found != here.members.end(), "fomoe_nccl::", op,
        ": communicator must be one that create returned and destroy did not get, got ",
        communicator);
  return found->second;
}

Stage stage_of(int64_t stage) {
  check(stage == 0 || stage == 1,
        "fomoe_nccl: stage must be 0 (intra-node) or 1 (inter-site), got ", stage);
  return static_cast<Stage>(stage);
}

/// Checks one count per member, none negative; their sum.
int64_t checked_sum(const char* name, const Counts& bytes, size_t num_members) {
  check(bytes.size() == num_members, "fomoe_nccl::all_to_all: ", name, " must have ", num_members,
        " values, one for each rank of the group, got ", bytes.size());
  int64_t sum = 0;
  for (const int64_t each : bytes) {
    check(each >= 0, "fomoe_nccl::all_to_all: ", name, " must not be negative, got ", each);
    sum += each;
  }
  return sum;
}

}  // namespace

int64_t nccl_open(const Tensor& path) {
  check_dtype("nccl_open", "path", path, ScalarType::Byte);
  const Tensor dense = torch::stable::contiguous(path);
  return opened({values_of<char>(dense), static_cast<size_t>(dense.numel())})->version();
}

Tensor nccl_unique_id() {
  UniqueId id;
  const comm::nccl::Result result = opened("")->get_unique_id(&id);
  check(result == comm::nccl::kSuccess,
        "fomoe_nccl::unique_id: NCCL said: ", opened("")->get_error_string(result));
  Tensor bytes = torch::stable::empty({sizeof(id.bytes)}, ScalarType::Byte);
  std::copy_n(id.bytes, sizeof(id.bytes), values_of<char>(bytes));
  return bytes;
}

int64_t nccl_create(const Tensor& unique_id, const Counts& ranks_per_site, int64_t rank,
                    int64_t timeout_ms, int64_t device_index) {
  comm::nccl::World world = {{ranks_per_site.begin(), ranks_per_site.end()},
                             static_cast<int>(rank),
                             {},
                             std::chrono::milliseconds(timeout_ms)};
  check_dtype("nccl_create", "unique_id", unique_id, ScalarType::Byte);
  check_shape("nccl_create", "unique_id", unique_id, {sizeof(world.id.bytes)}, "(128,)");
  check(unique_id.is_cpu(), "fomoe_nccl::create: unique_id must be on the CPU");
  const Tensor dense = torch::stable::contiguous(unique_id);
  std::copy_n(values_of<char>(dense), sizeof(world.id.bytes), world.id.bytes);
  const auto nccl = opened("");
  comm::nccl::check_cuda_device();  // torch's guard of a device that is not there is less clear
  const auto index = static_cast<int32_t>(device_index);
  const torch::stable::accelerator::DeviceGuard guard(index);
  auto transport =
      std::make_shared<NcclTransport>(nccl, comm::nccl::cuda_device(), std::move(world));
  State& here = state();
  const std::lock_guard lock(here.mutex);
  here.members[here.next_communicator] = {std::move(transport), index};
  return here.next_communicator++;
}

Counts nccl_group(int64_t communicator, int64_t stage) {
  const auto group = member_of("group", communicator).transport->group(stage_of(stage));
  return {group.begin(), group.end()};
}

Tensor nccl_gather_counts(int64_t communicator, const Tensor& counts) {
  const Member member = member_of("gather_counts", communicator);
  check_dtype("nccl_gather_counts", "counts", counts, ScalarType::Long);
  check_shape("nccl_gather_counts", "counts", counts, {-1}, "(n,)");
  check(counts.is_cpu(), "fomoe_nccl::gather_counts: counts must be on the CPU");
  const Tensor dense = torch::stable::contiguous(counts);
  Tensor all = empty_result(counts, {member.transport->world_size(), counts.size(0)});
  const torch::stable::accelerator::DeviceGuard guard(member.device_index);
  member.transport->gather_counts(values_of<int64_t>(dense), counts.size(0),
                                  values_of<int64_t>(all));
  return all;
}

Tensor nccl_all_to_all(int64_t communicator, int64_t stage, const Tensor& send, Counts send_bytes,
                       Counts receive_bytes) {
  const Member member = member_of("all_to_all", communicator);
  const Stage chosen = stage_of(stage);
  const size_t num_members = member.transport->group(chosen).size();
  check_dtype("nccl_all_to_all", "send", send, ScalarType::Byte);
  const int64_t sent = checked_sum("send_bytes", send_bytes, num_members);
  check_shape("nccl_all_to_all", "send", send, {sent}, "(sum of send_bytes,)");
  const int64_t received = checked_sum("receive_bytes", receive_bytes, num_members);
  const CudaCall call("nccl_all_to_all", {{"send", send}});
  check(send.get_device_index() == member.device_index, "fomoe_nccl::all_to_all: send must be on ",
        "device ", member.device_index, " of the communicator, got ", send.get_device_index());
  const Tensor dense = torch::stable::contiguous(send);
  Tensor result = empty_result(send, {received});
  member.transport->all_to_all(chosen, dense.const_data_ptr(), send_bytes.data(),
                               result.mutable_data_ptr(), receive_bytes.data(), call.stream());
  return result;
}

void nccl_check(int64_t communicator) { member_of("check", communicator).transport->check(); }

void nccl_abort(int64_t communicator) { member_of("abort", communicator).transport->abort(); }

void nccl_destroy(int64_t communicator) {
  Member member = member_of("destroy", communicator);
  {
    const std::lock_guard lock(state().mutex);
    state().members.erase(communicator);
  }
  const torch::stable::accelerator::DeviceGuard guard(member.device_index);
  member.transport.reset();
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY(fomoe_nccl, m) {
  m.def("open(Tensor path) -> int");
  m.def("unique_id() -> Tensor");
  m.def(
      "create(Tensor unique_id, int[] ranks_per_site, int rank, int timeout_ms, int device_index) "
      "-> int");
  m.def("group(int communicator, int stage) -> int[]");
  m.def("gather_counts(int communicator, Tensor counts) -> Tensor");
  m.def(
      "all_to_all(int communicator, int stage, Tensor send, int[] send_bytes, int[] receive_bytes) "
      "-> Tensor");
  m.def("check(int communicator) -> ()");
  m.def("abort(int communicator) -> ()");
  m.def("destroy(int communicator) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fomoe_nccl, CompositeExplicitAutograd, m) {
  m.impl("open", TORCH_BOX(&fomoe::binding::nccl_open));
  m.impl("unique_id", TORCH_BOX(&fomoe::binding::nccl_unique_id));
  m.impl("create", TORCH_BOX(&fomoe::binding::nccl_create));
  m.impl("group", TORCH_BOX(&fomoe::binding::nccl_group));
  m.impl("gather_counts", TORCH_BOX(&fomoe::binding::nccl_gather_counts));
  m.impl("all_to_all", TORCH_BOX(&fomoe::binding::nccl_all_to_all));
  m.impl("check", TORCH_BOX(&fomoe::binding::nccl_check));
  m.impl("abort", TORCH_BOX(&fomoe::binding::nccl_abort));
  m.impl("destroy", TORCH_BOX(&fomoe::binding::nccl_destroy));
}
