"""What holds for all tests."""

import signal

# a background job of a script ignores SIGINT, and so would all processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
