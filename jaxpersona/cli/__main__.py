"""Run the command `jaxpersona` with `python -m jaxpersona.cli`."""

from jaxpersona.cli.main import main

if __name__ == "__main__":
    main()
