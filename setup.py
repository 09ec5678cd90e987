"""The shipped configs lie beside the package in a checkout; a wheel has them inside it."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Adds `configs/` as `lm_jax/configs`; an editable install reads the checkout's."""

    def run(self) -> None:
        """Build the package, its data and the configs."""
        if not self.editable_mode:
            self.packages = [*self.packages, "lm_jax.configs"]
            self.package_dir = {**self.package_dir, "lm_jax.configs": "configs"}
        super().run()


setup(cmdclass={"build_py": BuildWithConfigs})
