"""What `marlin doctor` finds, and what it says to do, on machines of every kind."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from marlin.errors import LaunchError, UnsupportedError
from marlin.runtime import cache, compiler, diagnose, driver, loaded

H100 = driver.DeviceInfo(0, "NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 52428800, 1980000, 3.35e12)


class FakeKernel:
    def launch(self, grid, threads, stream, args):
        assert (grid, threads, stream, args) == ((1, 1, 1), 32, 0, ())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without a GPU; `machine(...)` gives it a driver and GPUs."""

    def give(version=None, devices=()):
        monkeypatch.setattr(driver, "driver_version", lambda: version)
        monkeypatch.setattr(driver, "device_count", lambda: len(devices))
        monkeypatch.setattr(driver, "device_info", lambda index: devices[index])
        monkeypatch.setattr(loaded, "load_kernel", lambda *args, **kwargs: FakeKernel())
        monkeypatch.setattr(driver, "synchronize", lambda index: None)
        monkeypatch.setattr(diagnose, "cuda_of_torch", lambda: "13.0" if devices else None)

    give()
    return give


def checks(self_test=None) -> dict[str, diagnose.Check]:
    return {check.name: check for check in diagnose.diagnose(self_test)}


def test_diagnose_of_a_machine_without_gpu_fails_only_what_a_gpu_needs(folder):
    found = checks()
    assert list(found) == ["python", "torch", "safetensors", "transformers", "driver", "nvrtc", "compile", "cache"]
    assert [check.name for check in found.values() if not check.ok] == ["driver"]
    assert found["driver"] == diagnose.Check(
        "driver",
        False,
        "no NVIDIA driver",
        "Install the NVIDIA driver if there is a GPU. Without it the CPU implementation runs.",
        "gpu",
    )
    assert found["torch"].detail.endswith(", without CUDA")
    assert found["nvrtc"].detail.endswith(" (no driver to compare with)")
    assert re.fullmatch(r"sm_80, \d+ bytes", found["compile"].detail)
    assert found["cache"].detail == f"{folder}: 0 kernels, 0.0 MB"


def test_diagnose_of_a_machine_with_gpus_is_all_well(machine):
    machine((99, 0), (H100, H100))
    found = checks()
    assert [check.name for check in found.values() if not check.ok] == []
    assert [name for name in found if name not in ("python", "torch", "safetensors", "transformers")] == [
        "driver",
        "gpu 0",
        "gpu 1",
        "nvrtc",
        "compile",
        "launch",
        "cache",
    ]
    assert found["driver"].detail == "CUDA 99.0"
    assert found["gpu 0"].detail == "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 multiprocessors, 3350 GB/s"
    assert found["compile"].detail.startswith("sm_90, ")
    assert found["launch"].detail == "a kernel ran on GPU 0"
    assert found["torch"].detail.endswith(", built with CUDA 13.0")


def test_diagnose_gives_a_fix_exactly_for_what_fails(machine, folder):
    folder.mkdir()
    folder.chmod(0o777)
    machine((11, 8), ())
    for check in diagnose.diagnose(lambda: 1 // 0):
        assert bool(check.fix) == (not check.ok), check


@pytest.mark.parametrize(
    ("version", "devices", "name", "detail", "fix"),
    [
        ((11, 8), (), "driver", "CUDA 11.8", "Update the driver to one for CUDA 12 or newer."),
        (
            (13, 0),
            (),
            "driver",
            "CUDA 13.0, but no GPU is visible",
            "Check nvidia-smi, CUDA_VISIBLE_DEVICES, and whether a container is given the GPU. Without it the CPU "
            "implementation runs.",
        ),
        (
            (13, 0),
            (driver.DeviceInfo(0, "Tesla T4", (7, 5), 40, 65536, 4194304, 1590000, 3.2e11),),
            "gpu 0",
            "Tesla T4, compute capability 7.5, 40 multiprocessors, 320 GB/s",
            "The kernels need compute capability 8.0 (Ampere) or newer. Without it the CPU implementation runs.",
        ),
    ],
)
def test_diagnose_says_what_to_do_about_driver_and_gpu(machine, version, devices, name, detail, fix):
    machine(version, devices)
    assert checks()[name] == diagnose.Check(name, False, detail, fix, "gpu")


@pytest.mark.parametrize(
    ("nvrtc", "supported", "ok"),
    [((13, 5), (13, 0), True), ((12, 4), (13, 0), True), ((13, 0), (12, 8), False), ((14, 0), (13, 5), False)],
)
def test_diagnose_compares_nvrtc_with_the_driver_by_major_version(machine, monkeypatch, nvrtc, supported, ok):
    machine(supported, ())
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: nvrtc)
    check = diagnose._nvrtc()
    assert check.ok == ok
    assert check.detail == f"{nvrtc[0]}.{nvrtc[1]}, driver CUDA {supported[0]}.{supported[1]}"
    extra = "cuda12" if supported[0] == 12 else "cuda"
    expected = f"Update the driver, or install the compiler of its version: pip install 'sparse-marlin[{extra}]'."
    assert check.fix == ("" if ok else expected)


def test_diagnose_wants_a_torch_with_cuda_where_there_is_a_gpu(machine, monkeypatch):
    machine((13, 0), (H100,))
    monkeypatch.setattr(diagnose, "cuda_of_torch", lambda: None)
    check = checks()["torch"]
    assert (check.ok, check.needed_for) == (False, "gpu")
    assert check.fix == "There is a GPU: install a build of torch with CUDA."


def test_diagnose_passes_on_what_to_install_without_nvrtc(monkeypatch):
    def absent():
        raise UnsupportedError("compile_cubin: NVRTC must be installed; got no libnvrtc (not found). Install it: pip.")

    monkeypatch.setattr(compiler, "nvrtc_version", absent)
    assert checks()["nvrtc"] == diagnose.Check(
        "nvrtc",
        False,
        "compile_cubin: NVRTC must be installed; got no libnvrtc (not found)",
        "Install it: pip.",
        "gpu",
    )


def test_diagnose_tells_when_a_kernel_does_not_run(machine, monkeypatch):
    machine((13, 0), (H100,))

    def broken(index):
        raise LaunchError("synchronize: the work must succeed; got CUDA_ERROR_UNKNOWN (unknown). Reboot.")

    monkeypatch.setattr(driver, "synchronize", broken)
    check = checks()["launch"]
    assert (check.ok, check.fix) == (False, "Reboot.")


def test_diagnose_survives_any_exception_of_a_check(machine, monkeypatch):
    machine((13, 0), (H100,))

    def broken(index):
        raise KeyError("surprise")

    monkeypatch.setattr(driver, "device_info", broken)
    check = checks()["gpu 0"]
    assert (check.ok, check.detail) == (False, "KeyError: 'surprise'")


def test_diagnose_shows_what_ails_the_cache(folder):
    folder.mkdir()
    folder.chmod(0o777)
    assert checks()["cache"] == diagnose.Check(
        "cache",
        False,
        f"kernel cache: {folder} must not be writable by everyone; got mode 0777",
        "Remove it; it is made anew, with mode 0700.",
        "gpu",
    )


def test_diagnose_runs_the_self_test_that_it_is_given():
    assert checks(lambda: "64 x 64, worst error 1e-4")["self-test"] == diagnose.Check(
        "self-test", True, "64 x 64, worst error 1e-4"
    )

    def fails() -> str:
        raise ValueError("wrong by 3")

    check = checks(fails)["self-test"]
    assert (check.ok, check.detail) == (False, "ValueError: wrong by 3") and check.fix


@pytest.mark.parametrize(
    ("installed", "ok", "fix"),
    [
        (None, False, "Install it: pip install 'sparse-marlin[transformers]'."),
        ("4.9.2", False, "Version 5.0 or newer is needed: pip install -U 'sparse-marlin[transformers]'."),
        ("5.0.0.dev0", True, ""),
        ("5.23.0", True, ""),
    ],
)
def test_diagnose_compares_versions_as_numbers(monkeypatch, installed, ok, fix):
    monkeypatch.setattr(diagnose, "_installed", lambda package: installed)
    check = diagnose._package("transformers", "transformers")
    assert (check.ok, check.detail, check.fix) == (ok, installed or "not installed", fix)


def test_diagnose_refuses_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert checks()["python"].fix == "Install Python 3.10 or newer."


def test_minimum_versions_are_those_of_the_project_file():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for package, version in diagnose.MINIMUM_VERSIONS.items():
        assert f'"{package}>={version}"' in text
    assert f'requires-python = ">={".".join(map(str, diagnose.MINIMUM_PYTHON))}"' in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", None),
        ("__version__ = '2.4.0'\ncuda: Optional[str] = '12.1'\ngit_version = 'abc'\n", "12.1"),
        ("cuda = '13.0'\n", "13.0"),
        ("hip: Optional[str] = '6.2'\ncuda: Optional[str] = None\n", None),
    ],
)
def test_cuda_of_torch_is_read_without_importing_torch(tmp_path, monkeypatch, text, expected):
    monkeypatch.undo()
    (tmp_path / "version.py").write_text(text)

    class Distribution:
        def locate_file(self, name):
            assert name == "torch/version.py"
            return tmp_path / "version.py"

    monkeypatch.setattr(diagnose.metadata, "distribution", lambda name: Distribution())
    assert diagnose.cuda_of_torch() == expected


def test_diagnose_compiles_without_filling_the_cache():
    diagnose.diagnose()
    assert cache.info().entries == 0
