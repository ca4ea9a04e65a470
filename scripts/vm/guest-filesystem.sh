# Sourced in the guest (busybox sh). $DEV is the volume, $MEBIBYTES how much to write, $MOUNT_OPTIONS for mount.
# A filesystem is made, filled in the ways that programs do (large, direct, many small fsyncs), read back from the disk,
# trimmed and checked.
on_filesystem() {
  step mkfs
  mkfs.ext4 -q -F "$DEV" || return 1
  step write
  mount -t ext4 -o "$MOUNT_OPTIONS" "$DEV" /mnt || return 1
  dd if=/dev/urandom of=/mnt/large bs=64k count=$((MEBIBYTES * 16)) conv=fsync 2>/dev/null || return 1
  dd if=/dev/urandom of=/mnt/direct bs=64k count=16 oflag=direct 2>/dev/null || return 1
  for i in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom "of=/mnt/small$i" bs=4k count=1 conv=fsync 2>/dev/null || return 1
  done
  (cd /mnt && sha256sum large direct small? > /tmp/sums) || return 1
  umount /mnt || return 1
  echo 3 > /proc/sys/vm/drop_caches
  step verify
  mount -t ext4 -o "$MOUNT_OPTIONS" "$DEV" /mnt || return 1
  (cd /mnt && sha256sum -c /tmp/sums) || return 1
  step trim
  cp /mnt/large /mnt/gone && sync && rm /mnt/gone || return 1
  fstrim -v /mnt || return 1
  (cd /mnt && sha256sum -c /tmp/sums > /dev/null) || return 1
  umount /mnt || return 1
  step fsck
  e2fsck -fn "$DEV" || return 1
}
limits() { # limits DEVICE: what the driver has understood of the export
  echo "size=$(blockdev --getsize64 "/dev/$1") $(cd "/sys/block/$1/queue" && for f in logical_block_size max_sectors_kb discard_max_bytes \
    write_zeroes_max_bytes write_cache fua; do echo "$f=$(cat $f)"; done | tr '\n' ' ')"
}
