"""Package metadata: what is installed, with which versions, and the optional extras."""

from setuptools import find_packages, setup

setup(
    name="mlomae",
    version="0.1.0",
    description="Masked autoencoders that learn which patches to hide, at cluster scale",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mlomae*", "data_ffcv*", "eval*"]),
    install_requires=[
        "torch>=2.6,<3",
        "torchvision>=0.21,<1",
        "deepspeed>=0.18.7",  # 0.18.5 and 0.18.6 are 2.5 times slower
        "timm>=1.0.23",  # the first whose Block takes attn_layer
        "numba>=0.59",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",  # scores of clusterings; an independent reference in tests
        "scipy>=1.10",  # optimal matching of clusters and classes
        "simplejpeg>=1.7",
        "tensorboard>=2.16",
        "torchmetrics>=1.4",
    ],
    extras_require={
        "datasets": ["datasets>=3"],
        "ffcv": [
            "ffcv==1.0.2",  # the last release; data_ffcv extends its loader classes
            "setuptools",  # FFCV imports distutils, which Python 3.12 gets from here
        ],
        "flash": ["flash-attn>=2.7"],
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"],
        "dev": [
            "codespell>=2.4",
            "datasets>=3",
            "mypy>=1.15",
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "onnxscript>=0.2",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "transformers>=4.46",  # an independent reference of the models and their weights
            "types-PyYAML>=6",
            "webdataset>=0.2.86",  # likewise of tar files
        ],
    },
)
