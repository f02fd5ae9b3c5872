#!/bin/sh
# The first process of a host of lab.py, in namespaces of its own; it ends in `sleep`, which holds them.
#   first_process.sh NAME TEXT_OF_THE_HOSTS_FILE
# It ignores SIGCHLD, so that what is orphaned in the host leaves no zombies. Files are written in the host's own shared
# memory and bound to their places. /sys must be mounted anew to show the host's interfaces, and keeps the control groups
# below it.
set -e
trap '' CHLD
echo "$1" > /proc/sys/kernel/hostname
mount -t tmpfs -o mode=1777 shm /dev/shm
mkdir /dev/shm/.etc /dev/shm/.cgroup
mount --rbind /sys/fs/cgroup /dev/shm/.cgroup || true
mount -t sysfs sysfs /sys
mount --move /dev/shm/.cgroup /sys/fs/cgroup || true
cd /dev/shm/.etc
printf '%s' "$2" > hosts
echo 'hosts: files' > nsswitch.conf
echo '# no name servers' > resolv.conf
echo "$1" > hostname
cat /proc/sys/kernel/random/uuid > boot_id
for name in hosts nsswitch.conf resolv.conf hostname; do
    [ ! -e "/etc/$name" ] || mount --bind "$name" "/etc/$name"
done
mount --bind boot_id /proc/sys/kernel/random/boot_id
cd /
rm -r /dev/shm/.etc
rmdir /dev/shm/.cgroup || true
for all in all default; do
    echo 0 > "/proc/sys/net/ipv6/conf/$all/accept_dad" || true
done
ip link set lo up
echo ready
exec sleep infinity <&- >&- 2>&-
