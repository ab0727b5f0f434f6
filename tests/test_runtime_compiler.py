"""NVRTC on the CPU: flags, log, every architecture, and the text of every refusal."""

from __future__ import annotations

import re
import sys

import pytest

from marlin.errors import CompileError, UnsupportedError
from marlin.runtime import compiler

TRIVIAL = 'extern "C" __global__ void trivial(float* x, int n) { x[threadIdx.x] = n; }\n'
# Sixty-four live sums in 24 registers: what does not fit is spilled.
CROWDED = """
extern "C" __global__ void crowded(float* x, int n) {
    float sum[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = x[i * 32 + threadIdx.x];
    for (int step = 0; step < n; ++step) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sum[i] = sum[i] * sum[(i + 7) % 64] + x[step];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = sum[i];
}
"""
# An ordinary instruction touches an accumulator between two wgmma of one stage.
SERIALIZED = """
extern "C" __global__ void serialized(float* x, unsigned long long a, unsigned long long b, int n) {
    float d[4] = {0, 0, 0, 0};
    asm volatile("wgmma.fence.sync.aligned;");
    for (int i = 0; i < n; i++) {
        asm volatile("{wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;}"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + i), "l"(b));
        d[0] += x[i];
        asm volatile("wgmma.commit_group.sync.aligned;");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


def compile_text(text: str, arch: str = "80", options: tuple[str, ...] = ()) -> compiler.Cubin:
    return compiler.compile_cubin(text, name="some_kernel", arch=arch, options=options)


@pytest.fixture
def fresh_nvrtc():
    """Forget the loaded compiler before and after."""
    compiler._nvrtc.cache_clear()
    compiler.supported_archs.cache_clear()
    yield
    compiler._nvrtc.cache_clear()
    compiler.supported_archs.cache_clear()


@pytest.mark.parametrize("arch", compiler.ARCHS)
def test_compile_cubin_gives_machine_code_and_resources_for_every_arch(arch):
    cubin = compile_text(TRIVIAL, arch)
    assert cubin.image.startswith(b"\x7fELF")
    assert b"trivial" in cubin.image
    assert cubin.registers is not None and 1 <= cubin.registers <= 32
    assert (cubin.spill_bytes, cubin.stack_bytes, cubin.serialized_wgmma) == (0, 0, ())
    assert f"'sm_{arch}'" in cubin.log and "\0" not in cubin.log


def test_archs_are_those_that_the_project_promises():
    assert compiler.ARCHS == ("80", "86", "89", "90", "90a", "100a", "120")


def test_compile_cubin_is_deterministic():
    assert compile_text(CROWDED).image == compile_text(CROWDED).image


def test_compile_cubin_keeps_nvrtc_from_answering_from_its_cache(monkeypatch):
    nvrtc, given = compiler._nvrtc(), []
    run = nvrtc.nvrtcCompileProgram
    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", lambda *args: given.extend(args[2]) or run(*args))
    compile_text(TRIVIAL)
    assert (b"--no-cache" in given) == (compiler.nvrtc_version() >= (12, 9))


def test_compile_cubin_takes_further_options():
    plain, lines = compile_text(TRIVIAL), compile_text(TRIVIAL, options=("-lineinfo",))
    assert b".debug_line" not in plain.image and b".debug_line" in lines.image


def test_flags_name_arch_first_and_keep_options_apart():
    assert compiler.flags("90a", ("-lineinfo", "--ptxas-options=-O2")) == (
        "--gpu-architecture=sm_90a",
        "-std=c++17",
        "--ptxas-options=-v",
        "-lineinfo",
        "--ptxas-options=-O2",
    )


def test_compile_cubin_reports_spills_and_stack():
    cubin = compile_text(CROWDED, options=("--maxrregcount=24",))
    assert cubin.registers is not None and cubin.registers <= 24
    assert cubin.spill_bytes and cubin.stack_bytes
    assert compile_text(CROWDED).spill_bytes == 0


def test_compile_cubin_reports_serialized_wgmma():
    cubin = compile_text(SERIALIZED, "90a")
    (note,) = cubin.serialized_wgmma
    assert re.search(r"\(C75\d\d\).*wgmma\.mma_async instructions are serialized", note)


@pytest.mark.parametrize("code", ["C7510", "C7511", "C7512", "C7515"])
def test_parse_log_finds_every_note_of_serialized_wgmma(code):
    note = f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x"
    assert compiler.parse_log(b"", f"before\n{note}\nafter").serialized_wgmma == (note,)


def test_parse_log_takes_the_largest_function_and_all_spills():
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_80'\n"
        "ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, 416 bytes cmem[0]\n"
        "ptxas         .     400 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    cubin = compiler.parse_log(b"image", log)
    assert (cubin.registers, cubin.spill_bytes, cubin.stack_bytes) == (255, 24, 400)


def test_parse_log_says_none_when_the_log_is_silent():
    assert compiler.parse_log(b"", "") == compiler.Cubin(b"", "", None, None)


def test_compile_error_carries_kernel_arguments_arch_and_whole_log():
    text = 'extern "C" __global__ void f() { missing_one(); }\nextern "C" __global__ void g() { missing_two(); }\n'
    with pytest.raises(CompileError) as caught:
        compile_text(text, "86", ("-lineinfo",))
    major, minor = compiler.nvrtc_version()
    shown = str(caught.value)
    assert shown.startswith(
        "compile_cubin[some_kernel]: the kernel must compile for sm_86; got NVRTC_ERROR_COMPILATION from NVRTC "
        f"{major}.{minor} with --gpu-architecture=sm_86 -std=c++17 --ptxas-options=-v -lineinfo. The whole log:\n"
    )
    assert 'some_kernel.cu(1): error: identifier "missing_one" is undefined' in shown
    assert 'some_kernel.cu(2): error: identifier "missing_two" is undefined' in shown


def test_compile_error_carries_the_words_of_the_assembler():
    with pytest.raises(CompileError, match=r"Not a name of any known instruction: 'frobnicate'"):
        compile_text('extern "C" __global__ void f() { asm volatile("frobnicate;"); }')


def test_compile_error_when_a_header_is_included():
    with pytest.raises(CompileError, match=r'open source file "nowhere\.h"'):
        compile_text('#include "nowhere.h"\n')


def test_compile_cubin_refuses_options_joined_by_commas():
    with pytest.raises(CompileError, match="--ptxas-options=-O2,-v"):
        compile_text(TRIVIAL, options=("--ptxas-options=-O2,-v",))


@pytest.mark.parametrize("arch", ["sm_80", "", "8.0", "90b", "080", "-80", "9"])
def test_compile_cubin_refuses_a_malformed_arch(arch):
    with pytest.raises(ValueError) as caught:
        compile_text(TRIVIAL, arch)
    assert str(caught.value) == (
        f"compile_cubin: arch must be digits with an optional a or f, like '80' or '90a'; got {arch!r}."
    )


def test_compile_cubin_says_what_to_do_about_an_unknown_arch(monkeypatch):
    monkeypatch.setattr(compiler, "supported_archs", lambda: (80, 86, 89, 90))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 4))
    with pytest.raises(UnsupportedError) as caught:
        compile_text(TRIVIAL, "120")
    assert str(caught.value) == (
        "compile_cubin: NVRTC must know the architecture sm_120; got NVRTC 12.4, which knows 80, 86, 89, 90. "
        "Install a newer one that the driver still takes: pip install -U nvidia-cuda-nvrtc-cu12."
    )


def test_compile_cubin_says_the_same_when_only_the_suffix_is_unknown():
    with pytest.raises(UnsupportedError, match="NVRTC must know the architecture sm_80a; got NVRTC"):
        compile_text(TRIVIAL, "80a")


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((8, 7), "86"), ((8, 9), "89"), ((9, 0), "90"), ((12, 1), "120")]
)
def test_arch_for_takes_the_nearest_of_the_same_major_version(monkeypatch, capability, arch):
    monkeypatch.setattr(compiler, "supported_archs", lambda: (75, 80, 86, 89, 90, 100, 120))
    assert compiler.arch_for(capability) == arch


def test_arch_for_refuses_a_major_version_that_nvrtc_does_not_know(monkeypatch):
    monkeypatch.setattr(compiler, "supported_archs", lambda: (80, 90))
    with pytest.raises(UnsupportedError, match="sm_103; got NVRTC"):
        compiler.arch_for((10, 3))


def test_supported_archs_are_ascending_and_hold_the_portable_ones():
    archs = compiler.supported_archs()
    assert list(archs) == sorted(archs) and {80, 86, 89, 90} <= set(archs)


@pytest.mark.usefixtures("fresh_nvrtc")
def test_compile_cubin_says_what_to_install_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnsupportedError) as caught:
        compile_text(TRIVIAL)
    shown = str(caught.value)
    assert shown.startswith("compile_cubin: NVRTC must be installed to compile kernels; got no cuda.bindings (")
    assert shown.endswith(compiler.INSTALL)


@pytest.mark.usefixtures("fresh_nvrtc")
def test_compile_cubin_says_what_to_install_without_the_library(monkeypatch):
    from cuda.bindings import nvrtc

    def absent():
        raise RuntimeError("Failed to find libnvrtc.so.99\nsearched here\nand there")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", absent)
    with pytest.raises(UnsupportedError) as caught:
        compile_text(TRIVIAL)
    shown = str(caught.value)
    assert shown.startswith(
        "compile_cubin: NVRTC must be installed to compile kernels; got no libnvrtc for cuda-bindings"
    )
    assert "(Failed to find libnvrtc.so.99). Both must be of one CUDA major version." in shown
    assert "sparse-marlin[cuda12]" in shown and "nvidia-cuda-nvrtc-cu12" in shown
