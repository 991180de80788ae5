"""`python -m simulation`: the command without an installation."""

from simulation.cli import main

if __name__ == "__main__":
    main()
