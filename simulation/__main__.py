"""`python -m simulation`: the command without an installation."""

from florilegium.simulation.cli.main import main

if __name__ == "__main__":
    main()
