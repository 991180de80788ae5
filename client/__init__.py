from client.folders import make_absolute

make_absolute()
