"""Does AGVM help? A large-batch study on the built-in data: the protocol is docs/study.md, and is written down first."""
