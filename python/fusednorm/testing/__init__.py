"""What the tests, ``fusednorm selftest`` and ``fusednorm bench`` share: the list of cases and their tolerances."""
