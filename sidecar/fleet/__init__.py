"""The bundle server: versions that verify, rings that they reach one after another, and who runs what.

`rollout` says what follows from what (pure), `store` keeps archives, `state` keeps everything else in a database, `server`
answers. It never signs: within what a release allowed when it was signed it can send a fleet back, and nothing more.
"""
