"""From the recipe's sources to token ids: files, formats, chat templates, loss masks, the order of rows."""
