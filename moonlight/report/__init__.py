"""`moonlight report`: one HTML page about a run, or about several runs compared, from the files in their folders.

Imports config, plan, files, errors, progress and the torch-free modules of train; no torch, so it starts fast.
Only the command line imports it.
"""
