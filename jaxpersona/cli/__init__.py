"""The command `jaxpersona`."""
