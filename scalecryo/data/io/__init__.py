"""Files and objects by address: whole reads and writes, byte ranges, retries, locks."""
