"""Other packages beside ours: second opinions and adapters, each imported only when it is used."""
