"""The command-line program `jaxpersona`."""
