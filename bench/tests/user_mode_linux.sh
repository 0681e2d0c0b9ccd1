#!/bin/busybox sh
# First process of a guest of user-mode Linux: loads the driver of its NIC, sets the address that the
# kernel's command line gives (rw.ip=ADDRESS), and runs the lines that come from the console.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t tmpfs tmpfs /tmp
export PATH=/bin
# This shell finds busybox's commands in itself.
stty -echo
for module in failover net_failover virtio_net; do
    insmod "/$module.ko"
done
for word in $(cat /proc/cmdline); do
    case $word in
    rw.ip=*) ip=${word#*=} ;;
    esac
done
ip link set lo up
ip link set eth0 up
ip addr add "$ip/24" dev eth0
echo '@@ready@@'
while read -r line; do
    sh -c "$line" </dev/null 2>&1
    echo "@@end $?@@"
done
