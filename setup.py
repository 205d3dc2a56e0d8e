"""Everything is in pyproject.toml; this file is where the native code of csrc/ joins the build.

With torch at hand (``pip install --no-build-isolation .``) the library is built now; without, its sources go into the
wheel and it is built at first use (ebft_kernels/_extension.py). A failing compiler never fails the install.
"""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


class BuildWithSources(build_py):
    """Puts csrc/ into the package, for a build at first use."""

    def run(self) -> None:
        """Build, and copy."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "ebft_kernels" / "csrc", dirs_exist_ok=True)


def native_build() -> dict:
    """Arguments of ``setup`` that build the native library; none where torch is not importable."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        print("ebft: torch is not here at build time; the native kernels are built at first use", file=sys.stderr)
        return {}
    # Not by import, which would bring the whole package and all that it needs.
    build = runpy.run_path(str(ROOT / "ebft_kernels" / "_build.py"))

    class BuildLibrary(cpp_extension.BuildExtension):
        """The library under a name that says which torch it fits."""

        def get_ext_filename(self, fullname: str) -> str:
            return str(Path(*fullname.split(".")[:-1]) / build["library_name"]())

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (CompileError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                self.extensions = []
                print(f"ebft: the native kernels were not built: {error}", file=sys.stderr)

        def get_outputs(self) -> list[str]:
            return [file for file in super().get_outputs() if Path(file).is_file()]

    sources, extension = build["cpp_sources"](ROOT / "csrc"), cpp_extension.CppExtension
    if build["cuda_compiler"]():
        sources, extension = sources + build["cuda_sources"](ROOT / "csrc"), cpp_extension.CUDAExtension
    library = extension(
        "ebft_kernels._native",
        [str(file.relative_to(ROOT)) for file in sources],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": build["CFLAGS"], "nvcc": build["NVCC_FLAGS"]},
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": BuildLibrary}}


arguments = native_build()
setup(
    ext_modules=arguments.get("ext_modules", []),
    cmdclass={"build_py": BuildWithSources, **arguments.get("cmdclass", {})},
)
