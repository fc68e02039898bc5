"""`python -m jaxpersona.cli` runs the command."""

from jaxpersona.cli.main import main

if __name__ == "__main__":
    main()
