"""Measured ceilings of this machine: `python -m benchmarks.ceilings`.

Owns three numbers that floors are made of: read bandwidth, copy bandwidth, and the rate of the dense library. Each is
the best of several, on random data. Writes `benchmarks/records/ceilings-<gpu>.json`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks import machine, records, traffic

_GIB = 1 << 30
# Every thread takes 16-byte words a grid apart, eight in flight; the sum keeps the loads alive.
_READ_KERNEL = """
extern "C" __global__ void __launch_bounds__(512) read_words(const uint4* words, long long count, unsigned* out) {
  const long long step = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned sum = 0;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 word[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) word[j] = __ldcs(words + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= word[j].x ^ word[j].y ^ word[j].z ^ word[j].w;
  }
  for (; i < count; i += step) sum ^= words[i].x;
  if (sum == 0x9e3779b9u) out[0] = sum;
}
"""


def _best_ms(run: Callable[[], object], repeats: int = 8) -> float:
    best = float("inf")
    for attempt in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if attempt >= 2:
            best = min(best, start.elapsed_time(end))
    return best


def copy_bytes_per_s(size: int) -> float:
    """Device-to-device copy, bytes read plus bytes written."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / (_best_ms(lambda: target.copy_(source)) * 1e-3)


def read_bytes_per_s(size: int) -> float:
    """A kernel that only reads. Raises: UnsupportedError (no run-time compiler)."""
    from marlin.runtime import cache, compiler, driver, loaded

    index = torch.cuda.current_device()
    info = driver.device_info(index)
    cubin = cache.get_cubin(_READ_KERNEL, name="read_words", arch=compiler.arch_for(info.arch))
    kernel = loaded.load_kernel(cubin, "read_words", device_index=index, smem_bytes=0, signature="PlP")
    words = torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    arguments = (words.data_ptr(), size // 16, out.data_ptr())
    launches = [
        functools.partial(kernel.launch, (info.num_sms * blocks, 1, 1), 512, stream, arguments) for blocks in (1, 2, 4)
    ]
    return size / (min(map(_best_ms, launches)) * 1e-3)


def flops_per_s(side: int) -> float:
    """torch.mm of random fp16 matrices, the best of three heights."""
    rates = []
    for m in (side // 2, side, 2 * side):
        left = torch.randn(m, side, device="cuda", dtype=torch.float16)
        right = torch.randn(side, side, device="cuda", dtype=torch.float16)
        out = torch.empty(m, side, device="cuda", dtype=torch.float16)
        run = functools.partial(torch.mm, left, right.T, out=out)
        rates.append(2 * m * side * side / (_best_ms(run) * 1e-3))
    return max(rates)


def measure() -> traffic.Ceilings:
    """All three, in about a second. Uses up to 8 GiB, less on small GPUs."""
    free, _ = torch.cuda.mem_get_info()
    size = min(4 * _GIB, free // 8 // 4096 * 4096)
    side = 8192 if free > 4 * _GIB else 2048
    found = traffic.Ceilings(read_bytes_per_s(size), copy_bytes_per_s(size), flops_per_s(side))
    torch.cuda.empty_cache()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="marlin bench ceilings", description=__doc__)
    parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.ceilings: a CUDA GPU is needed; got none. Run `marlin doctor`.", file=sys.stderr)
        return 2
    facts = machine.facts()
    found = measure()
    record = {**facts, "clocks": machine.clocks(), "ceilings": vars(found)}
    path = records.RECORDS / f"ceilings-{machine.slug(facts['gpu'])}.json"
    records.write(path, record)
    print(
        f"{facts['gpu']}: read {found.read_bytes_per_s / 1e9:.0f} GB/s, copy {found.copy_bytes_per_s / 1e9:.0f} GB/s,"
        f" dense fp16 {found.flops_per_s / 1e12:.0f} TFLOP/s -> {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
