"""From files to documents: which files a dataset names, how their bytes become text, where a document begins and ends."""
