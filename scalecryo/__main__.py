"""`python -m scalecryo` is `scalecryo`."""

from scalecryo.cli import main

if __name__ == "__main__":
    main()
