"""For all tests of synthesis."""

import os

# The servers of these tests are on this machine, whatever proxy it has.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
