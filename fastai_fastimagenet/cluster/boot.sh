# What a machine does on its first boot, after the watchdog was written to /opt/fastimagenet/watchdog.
# `user_data` in watch.py puts the settings in front: FOLDER, user, volume, efs, efs_folder.
say() { echo "fastimagenet: $*"; }
problem() { say "$*"; problems+=("$*"); }
problems=()
chmod 700 /opt/fastimagenet/watchdog
install -d -o "$user" "$FOLDER" "$FOLDER/watch" "$FOLDER/runs"
cat > /etc/systemd/system/fastimagenet-watchdog.service <<'END_OF_UNIT'
[Unit]
Description=Ends this machine when nobody needs it any more
[Service]
ExecStart=/bin/bash /opt/fastimagenet/watchdog
Restart=always
RestartSec=5
OOMScoreAdjust=-1000
StandardOutput=journal+console
StandardError=journal+console
[Install]
WantedBy=multi-user.target
END_OF_UNIT
if ! { timeout 60 systemctl daemon-reload && timeout 60 systemctl enable --now fastimagenet-watchdog; }; then
    setsid nohup bash -c 'while :; do /bin/bash /opt/fastimagenet/watchdog; sleep 5; done' < /dev/null > /dev/console 2>&1 &
    problem 'systemd did not start the watchdog; a loop does'
fi
timeout 60 systemctl disable --now apt-daily.timer apt-daily-upgrade.timer unattended-upgrades.service 2> /dev/null
sysctl -qw net.core.rmem_max=16777216 net.core.wmem_max=16777216 net.ipv4.tcp_rmem='4096 12582912 16777216' net.ipv4.tcp_wmem='4096 12582912 16777216' ||
    problem 'the network buffers keep their size'

added_volume() { # The first partition or disk with a file system, of an EBS disk with nothing mounted
    local disk
    for disk in $(lsblk -dno NAME,MODEL | awk '/Amazon Elastic Block Store/ {print $1}'); do
        [ -z "$(lsblk -nro MOUNTPOINT "/dev/$disk" | tr -d '[:space:]')" ] || continue
        lsblk -nrpo NAME,FSTYPE "/dev/$disk" | awk '$2 != "" {print $1; exit}'
    done | head -n 1
}

mount_volume() {
    local device='' try
    for try in {1..30}; do
        device=$(added_volume)
        [ -n "$device" ] && break
        sleep 2
    done
    mkdir -p "$volume"
    [ -n "$device" ] && timeout 120 mount -o noatime "$device" "$volume" || problem "the volume could not be mounted at $volume: ${device:-no EBS disk with a file system}"
}

mount_efs() {
    local try
    command -v mount.nfs4 > /dev/null || timeout 180 apt-get -o DPkg::Lock::Timeout=120 -qy install nfs-common || timeout 180 dnf -qy install nfs-utils
    mkdir -p "$efs_folder"
    for try in {1..10}; do
        timeout 30 mount -t nfs4 -o nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport,_netdev "$efs:/" "$efs_folder" && break
        sleep 5
    done
    timeout 30 mountpoint -q "$efs_folder" && chown "$user:" "$efs_folder" || problem "EFS $efs could not be mounted at $efs_folder"
}

[ -z "$volume" ] || mount_volume
[ -z "$efs" ] || mount_efs
printf '%s\n' "${problems[@]}" | sed '/^$/d' > "$FOLDER/watch/ready"
say "set-up is over; problems: ${#problems[@]}"
