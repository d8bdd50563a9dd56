"""`prefpipe doctor`: what works in this installation, and what to do about the rest.

Nothing but Python itself and modules of prefpipe that need no more are imported here: the doctor works where a package
of the core is broken. Every other package is imported in a child process, so that a crash is a finding.
"""
