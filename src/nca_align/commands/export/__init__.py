"""`nca-align export`: the trained model in one folder."""
