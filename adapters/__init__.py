"""Drop-in files, one a framework, each a thin renaming of arguments.

`calibrated-rewards path NAME` says where one lies, `calibrated-rewards cp NAME .` brings a copy to be changed; which
framework takes which, and how to switch it on, is in docs/guides/train.md.
"""
