#!/bin/busybox sh
# Configures the NIC; runs again after the driver was bound anew.
tries=100
until [ -e /sys/class/net/eth0 ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { echo "netup: no eth0"; exit 1; }
    usleep 20000
done
ip link set eth0 mtu "$(cat /tmp/mtu)"
ip link set eth0 up
ip addr flush dev eth0
ip addr add "$(cat /tmp/ip)" dev eth0
