"""`python -m mergekit_lite` is `pack`."""

from mergekit_lite.cli import main

main()
