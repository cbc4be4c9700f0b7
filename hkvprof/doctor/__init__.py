"""Does hkvprof compute the right thing on this model and this machine? See docs/doctor.md.

`examine.examine` runs the checks; what it says is a `records.Report`.
"""
