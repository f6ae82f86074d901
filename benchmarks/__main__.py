"""`make bench`: what can be measured without a server."""

from __future__ import annotations

from benchmarks.ack import main

if __name__ == "__main__":
    main()
