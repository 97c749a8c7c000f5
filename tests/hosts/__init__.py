"""Launches over several hosts, which are namespaces of one machine: real ssh, pdsh and TCP, nothing in their place."""
