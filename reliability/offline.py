# Copyright 2026 The trl_spo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Runs Python where there is no network but this machine itself, which processes of one run talk over.

    unshare --net python reliability/offline.py -m pytest tests
"""

import fcntl
import os
import socket
import struct
import sys


SIOCSIFFLAGS, IFF_UP, IFF_LOOPBACK, IFF_RUNNING = 0x8914, 0x1, 0x8, 0x40  # linux/sockios.h, linux/if.h


if __name__ == "__main__":
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        sys.exit(f"There are other network interfaces here, {names}: start this with `unshare --net`.")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP | IFF_LOOPBACK | IFF_RUNNING))
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
