"""Reproduction of a paper's tables; eval/reproduce.py is the program.

citation    Builds and checks reproduction.json: the numbers of a reproduction with what they
            depend on.
page        Renders reproduction.json as a page: each published number next to the one computed
            here.
parts       Divides a reproduction into parts, and plans and runs each as an evaluation of its own.
published   Lists every published number of a paper as a cell: its value, source, and metric of
            this suite.
scores      Scores the cells of a reproduction from the records that its parts have on disk.
"""
