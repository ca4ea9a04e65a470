//! STARTTLS over TCP: what is told before it, what works behind it, and what is never looked at.

mod nbd_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use nbd_support::*;
use nbdcast::nbd::{Backend, ListeningSocket, Manners, NbdServer, Tls};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};

const STARTTLS: u32 = 5;
const STRUCTURED_REPLY: u32 = 8;
const TLS_REQD: u32 = (1 << 31) + 5;

/// A server that requires TLS, and how a client trusts it.
fn server() -> (Running, Arc<ClientConfig>) {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = key.cert.der().clone();
    let secret = PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.clone()], secret);
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();

    let listening = ListeningSocket::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
    let manners = Manners { tls: Tls::Require(Arc::new(config.unwrap())), ..Manners::default() };
    let server = NbdServer::new(vec![listening], manners);
    server.publish(MemoryVolume::new("demo", 1 << 20) as Arc<dyn Backend>).unwrap();
    (Running::start(server), Arc::new(client))
}

fn encrypt(client: RawClient, config: &Arc<ClientConfig>) -> StreamOwned<ClientConnection, TcpStream> {
    let name = ServerName::try_from("localhost").unwrap();
    StreamOwned::new(ClientConnection::new(Arc::clone(config), name).unwrap(), client.stream)
}

fn take<const N: usize>(stream: &mut impl Read) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn trap_8_nothing_is_told_before_tls_and_everything_works_behind_it() {
    let (server, config) = server();
    let mut client = RawClient::greet(server.connect());
    for refused in [option(3, b""), option(STRUCTURED_REPLY, b""), go("demo")] {
        client.send(&refused);
        assert_eq!(client.option_reply().1, TLS_REQD);
    }
    client.send(&option(STARTTLS, b""));
    assert_eq!(client.option_reply().1, 1);
    let mut stream = encrypt(client, &config);
    stream.write_all(&go("demo")).unwrap();
    // INFO_EXPORT and the acknowledgement; then simple replies.
    take::<52>(&mut stream);
    stream.write_all(&request(WRITE, 0, 7, 4096, 3)).unwrap();
    stream.write_all(b"abc").unwrap();
    stream.write_all(&request(READ, 0, 8, 4096, 3)).unwrap();
    assert_eq!(take::<16>(&mut stream), *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07");
    assert_eq!(take::<19>(&mut stream), *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x08abc");
}

#[test]
fn trap_8_unencrypted_bytes_behind_starttls_end_the_connection() {
    let (server, _config) = server();
    let mut client = RawClient::greet(server.connect());
    let mut bytes = option(STARTTLS, b"");
    bytes.extend(go("demo"));
    client.send(&bytes);
    client.expect_closed();
}
