"""stub"""


def main(argv):
    raise NotImplementedError
