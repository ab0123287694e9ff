"""What policy says: the question to OPA, the strict reading of its answer, and the OPA process itself.

`inquiry` is the contract with Rego and is pure. `opa` asks over a socket, `engine` keeps an OPA at the other end of it
(`child` is the process), and `install` gets the binary. This room knows nothing of identities, listeners or upstreams.
"""
