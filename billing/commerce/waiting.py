"""What a change that Dodo announces can fail with: ``NotYet``, to be tried again later."""


class NotYet(Exception):
    """This cannot be applied now; the message says what is missing. A later try may find it."""
