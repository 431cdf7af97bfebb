"""The commands of `nca-align`, a module or a package each."""
