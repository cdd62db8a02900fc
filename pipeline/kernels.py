"""Makes `pipeline.kernels.X` mean `kernels/X.py`.

The folder `kernels/` has no `__init__.py`: transformers and bitsandbytes import Hugging Face's package `kernels` when
it is installed, and a package of ours under that name would be found in its place.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
