"""Small models and adapters that the tests share; on the path of every test as `support`."""
