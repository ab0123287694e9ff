"""Who we are and who a peer is: SPIFFE IDs, the judgement of a handshake, and the identity that we present.

`spiffe` reads IDs, `certificate` the few parts of a leaf that matter, and `verify` judges peers; all are pure. `current` holds the
published identity, and a source (`pem_files`) keeps it up to date, after `svid` has checked it apart. This room builds no TLS context and opens no connection to a peer.
"""
