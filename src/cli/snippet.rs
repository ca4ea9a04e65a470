//! What to change in the config file after an order, as text to copy: the next start reads it. Changes no file.

use listener_agent::config::ByteSize;

use crate::config::ReplicaPlace;

/// After a replica was added.
pub(super) fn added(volume: &str, replica: &str, place: &ReplicaPlace) -> String {
    let mut text = format!(
        "Add it to volume {volume} in the config file: once it is a member, a start without it is refused.\n\n  \
         [[volume.replica]]\n  name = {}\n",
        quoted(replica)
    );
    match place {
        ReplicaPlace::Agent { address, certificate } => {
            text.push_str(&format!("  address = {}\n", quoted(&address.to_string())));
            if let Some(certificate) = certificate {
                text.push_str(&format!("  certificate = {}\n", quoted(certificate)));
            }
        }
        ReplicaPlace::Embedded { path, image } => {
            text.push_str(&format!("  path = {}\n", quoted(&path.display().to_string())));
            if let Some(image) = image {
                text.push_str(&format!("  image = {}\n", quoted(&image.display().to_string())));
            }
        }
    }
    text
}

/// After a replica was removed.
pub(super) fn removed(volume: &str, replica: &str) -> String {
    format!(
        "Take its [[volume.replica]], name = {}, out of volume {volume} in the config file: the next start would add it \
         again.\n",
        quoted(replica)
    )
}

/// After a volume has grown.
pub(super) fn resized(volume: &str, size: ByteSize) -> String {
    format!("Set its size in the config file, in volume {volume}:\n\n  size = {}\n", quoted(&size.to_string()))
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EngineConfig;

    /// A config with this replica added to it.
    fn config(text: &str) -> EngineConfig {
        let start = text.find("[[").expect("a table");
        let text = format!(
            "[agents]\ncertificates = \"certs\"\n[[volume]]\nname = \"vol0\"\nsize = \"1GiB\"\n{}",
            &text[start..]
        );
        EngineConfig::parse(std::path::Path::new("/c/engine.toml"), &text).expect(&text)
    }

    #[test]
    fn what_is_to_be_added_to_the_config_means_the_replica_that_was_added() {
        let address: listener_agent::config::Endpoint = "127.0.0.1:10814".parse().expect("an address");
        let named = ReplicaPlace::Agent { address: address.clone(), certificate: Some("node-d".to_owned()) };
        let agent = ReplicaPlace::Agent { address, certificate: None };
        let odd = ReplicaPlace::Embedded { path: "/a \"b\"\\\u{7}/c".into(), image: Some("/dev/x".into()) };
        for place in [agent, named, odd] {
            let config = config(&added("vol0", "d", &place));
            let replica = &config.volumes[0].replicas[0];
            assert_eq!((replica.name.as_str(), &replica.place), ("d", &place));
        }
    }

    #[test]
    fn a_new_size_is_shown_as_the_config_has_it() {
        assert!(resized("vol0", ByteSize::gib(20)).ends_with("  size = \"20GiB\"\n"));
    }
}
