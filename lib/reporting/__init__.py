"""Tables, figures and the published values that they are compared with."""
