"""Other libraries, as they are installed: no test here asks the network for anything."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
