"Send or receive 40 MB, and print what the meter of this machine saw: `net_meter.py send|receive ADDRESS`"
import json, os, socket, sys, time
os.environ.update(WORLD_SIZE='2', LOCAL_WORLD_SIZE='1', RANK=str(int(sys.argv[1]=='receive')), MASTER_ADDR=sys.argv[2])
from fastai_fastimagenet.meters import NetMeter

n = 40_000_000
meter = NetMeter()
before,began = meter.last # Before the first byte; and by the meter's own clock, as what comes between two clocks would count on a busy machine
if sys.argv[1]=='send':
    server = socket.create_server((sys.argv[2], 5999))
    conn,_ = server.accept()
    conn.sendall(bytes(n))
    conn.shutdown(socket.SHUT_WR)
    conn.recv(1) # The other one has it all
else:
    for _ in range(600):
        try: conn = socket.create_connection((sys.argv[2], 5999))
        except OSError: time.sleep(.1)
        else: break
    while conn.recv(1<<20): pass
    conn.sendall(b'1')
rates = meter.gbit_s()
after,ended = meter.last
seconds = ended-began
print(json.dumps(dict(interface=meter.interface, received=after[0]-before[0], sent=after[1]-before[1], rates=rates, seconds=seconds)))
