#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compiler launcher: runs the compiler and keeps what it says beside the object, where
# tools/check_kernels.py reads it, also when a later build has nothing to compile. On the terminal
# appears what is not one of the lines that -Xptxas=-v adds for every kernel.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"

"$@" >"$object.log" 2>&1
status=$?
grep -v -e '^ptxas info *: \(Compiling\|Function prop\|Used\|Compile time\|[0-9]* bytes gmem\)' \
  -e '^ *[0-9]* bytes stack frame' "$object.log" >&2
exit $status
