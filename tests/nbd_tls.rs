//! STARTTLS over TCP: what is told before it, what works behind it, and what is never looked at.

mod nbd_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use nbd_support::chunks::{EXTENDED_HEADERS, STRUCTURED_REPLY, allocation_of};
use nbd_support::*;
use nbdcast::nbd::{Backend, ListeningSocket, Manners, NbdServer, Tls};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};

const STARTTLS: u32 = 5;
const ACK: u32 = 1;
const ERR_INVALID: u32 = (1 << 31) + 3;
const TLS_REQD: u32 = (1 << 31) + 5;
/// Transmission flag.
const SEND_DF: u16 = 1 << 7;
const SIZE: u64 = 16 << 20;

/// A volume, a server where TLS is as `mode` makes it, and how a client trusts it.
fn server(mode: fn(Arc<ServerConfig>) -> Tls) -> (Arc<MemoryVolume>, Running, Arc<ClientConfig>) {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = key.cert.der().clone();
    let secret = PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.clone()], secret);
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();

    let listening = ListeningSocket::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
    let manners = Manners { tls: mode(Arc::new(config.unwrap())), ..Manners::default() };
    let server = NbdServer::new(vec![listening], manners);
    let volume = MemoryVolume::new("demo", SIZE);
    server.publish(Arc::clone(&volume) as Arc<dyn Backend>).unwrap();
    (volume, Running::start(server), Arc::new(client))
}

fn encrypt(client: RawClient, config: &Arc<ClientConfig>) -> StreamOwned<ClientConnection, TcpStream> {
    let name = ServerName::try_from("localhost").unwrap();
    StreamOwned::new(ClientConnection::new(Arc::clone(config), name).unwrap(), client.stream)
}

/// Behind STARTTLS.
fn started(mut client: RawClient, config: &Arc<ClientConfig>) -> StreamOwned<ClientConnection, TcpStream> {
    client.send(&option(STARTTLS, b""));
    assert_eq!(client.option_reply().1, ACK);
    encrypt(client, config)
}

/// Chooses the export without any agreement; returns its transmission flags.
fn choose(stream: &mut (impl Read + Write)) -> u16 {
    stream.write_all(&go("demo")).unwrap();
    let (information, _acknowledged) = (take::<32>(stream), take::<20>(stream));
    u16::from_be_bytes([information[30], information[31]])
}

fn take<const N: usize>(stream: &mut impl Read) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn trap_8_nothing_is_told_before_tls_and_everything_works_behind_it() {
    let (_volume, server, config) = server(Tls::Require);
    let mut client = RawClient::greet(server.connect());
    for refused in [option(3, b""), option(STRUCTURED_REPLY, b""), go("demo")] {
        client.send(&refused);
        assert_eq!(client.option_reply().1, TLS_REQD);
    }
    let mut stream = started(client, &config);
    choose(&mut stream);
    stream.write_all(&request(WRITE, 0, 7, 4096, 3)).unwrap();
    stream.write_all(b"abc").unwrap();
    stream.write_all(&request(READ, 0, 8, 4096, 3)).unwrap();
    assert_eq!(take::<16>(&mut stream), *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07");
    assert_eq!(take::<19>(&mut stream), *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x08abc");
}

#[test]
fn trap_8_unencrypted_bytes_behind_starttls_end_the_connection() {
    let (_volume, server, _config) = server(Tls::Require);
    let mut client = RawClient::greet(server.connect());
    let mut bytes = option(STARTTLS, b"");
    bytes.extend(go("demo"));
    client.send(&bytes);
    client.expect_closed();
}

#[test]
fn trap_8_what_was_agreed_on_before_tls_is_forgotten() {
    let (_volume, server, config) = server(Tls::On);
    for agreed in [STRUCTURED_REPLY, EXTENDED_HEADERS] {
        let mut client = RawClient::greet(server.connect());
        for accepted in [option(agreed, b""), allocation_of("demo")] {
            client.send(&accepted);
            while client.option_reply().1 != ACK {}
        }
        let mut stream = started(client, &config);
        stream.write_all(&allocation_of("demo")).unwrap();
        let reply = take::<20>(&mut stream);
        assert_eq!(reply[12..16], ERR_INVALID.to_be_bytes(), "a context needs replies in chunks");
        let mut text = vec![0; u32::from_be_bytes(reply[16..].try_into().unwrap()) as usize];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(choose(&mut stream) & SEND_DF, 0, "as for a client that never asked");
        stream.write_all(&request(READ, 0, 8, 4096, 3)).unwrap();
        assert_eq!(take::<19>(&mut stream), *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x08\0\0\0");
        stream.write_all(&request(BLOCK_STATUS, 0, 9, 0, 4096)).unwrap();
        assert_eq!(take::<16>(&mut stream), *b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x09");
    }
}

#[test]
fn answers_of_many_threads_reach_a_slow_reader_whole() {
    const COUNT: usize = 256;
    const LENGTH: usize = 65536 - 13;
    let (volume, server, config) = server(Tls::Require);
    let mut stream = started(RawClient::greet(server.connect()), &config);
    choose(&mut stream);
    let content: Vec<u8> = (0..SIZE as usize).map(|at| (at % 251) as u8 ^ (at >> 16) as u8).collect();
    stream.write_all(&request(WRITE, 0, 0, 0, SIZE as u32)).unwrap();
    stream.write_all(&content).unwrap();
    take::<16>(&mut stream);
    for round in 0..2 {
        volume.hold();
        for cookie in 0..COUNT {
            stream.write_all(&request(READ, 0, cookie as u64, (cookie << 16) as u64, LENGTH as u32)).unwrap();
        }
        volume.wait_held(COUNT);
        std::thread::scope(|scope| {
            let release = scope.spawn(|| volume.release_from_many_threads());
            if round == 0 {
                // Nobody reads until every answer is there: far more than the sockets hold.
                release.join().unwrap();
            }
            let mut missing = vec![true; COUNT];
            for _ in 0..COUNT {
                let head = take::<16>(&mut stream);
                assert_eq!(head[..8], *b"\x67\x44\x66\x98\0\0\0\0");
                let cookie = u64::from_be_bytes(head[8..].try_into().unwrap()) as usize;
                assert!(std::mem::take(&mut missing[cookie]), "{cookie} is answered once");
                let mut data = vec![0; LENGTH];
                // In small pieces, so that the other side is always ahead.
                data.chunks_mut(1000).for_each(|piece| stream.read_exact(piece).unwrap());
                assert!(data == content[cookie << 16..(cookie << 16) + LENGTH], "the data of {cookie}");
            }
        });
    }
}
