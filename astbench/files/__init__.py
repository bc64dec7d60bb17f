"""Files and Hugging Face data sets: read with one line on what is wrong, written so that nothing is lost."""
